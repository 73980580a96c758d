"""The way out to the services that hold money: what is sent, and how what comes back is read.

The rule kept here: `line` moves bytes and knows whether any left; `documents` and `outcomes` give
them their meaning and touch nothing; `client` and `wallet` say what is asked of an escrow and of a
payer's wallet. None decides whether or how much to pay: that is `core.settlement`'s.
"""
