"""WHERE: each executor runs packs somewhere, behind one protocol."""
