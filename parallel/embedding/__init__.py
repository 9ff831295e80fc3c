"""Embedding tables, sharded over all processes by TorchRec: tables, plans, lookups."""
