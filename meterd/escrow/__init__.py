"""The way out to the escrow service: what is sent, and how what comes back is read.

The rule kept here: `client` moves bytes and knows whether any left; `outcomes` gives them their
meaning and touches nothing. Neither decides whether or how much to pay: that is
`core.settlement`'s.
"""
