"""The command line: parse, call, print.

The rule: no decision about money is made here. What concerns a running daemon goes through its
HTTP API; what a command needs is imported when it runs, so that `meterd status` answers at once.
"""
