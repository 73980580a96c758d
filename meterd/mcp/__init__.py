"""The door for agents, `/mcp`: the Model Context Protocol, for whoever has tools to offer.

The rule kept here: this room knows the protocol and no money. The daemon and the sandbox bring
their own tools, each behind its own guard, and share nothing but the way to this door. The SDK is
an extra: it is imported when the first agent comes, and by nobody else.
"""
