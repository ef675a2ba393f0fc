"""WHAT: a configuration becomes a frozen study of cells and evaluations, with commits and hashes resolved."""
