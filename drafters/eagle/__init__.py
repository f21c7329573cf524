"""EAGLE: small transformers that draft from the target's hidden states."""
