"""What must survive the process: the embedded store and the memory of seen events."""
