"""Question -> pages: every ranking on its own, then fused."""
