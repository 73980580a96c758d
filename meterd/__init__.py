"""meterd turns usage of an AI-agent service into exact payments out of the payer's escrow."""

__version__ = "0.1.0"
