"""An escrow service of the contract, for development, the demo and tests: another party's server.

It shares exact money with the daemon and nothing else, so that the two can disagree.
"""
