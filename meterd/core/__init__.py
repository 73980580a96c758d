"""The pure core: values in, values out. No asyncio, clock, file, log, metric or network in here."""
