"""How the shipped mmrag-nano is made."""
