"""OpenTelemetry's spans and log records as usage events: pure, from bytes to bytes.

`reading` decodes what an exporter sends, `genai` says which of it is usage and writes that as
CloudEvents, `answers` writes what OTLP wants to hear. None of them knows HTTP, a clock or the
ledger.
"""
