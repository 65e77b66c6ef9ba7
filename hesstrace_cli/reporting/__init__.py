"""How results look: tables for a terminal, Markdown; no torch."""
