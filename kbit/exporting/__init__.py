"""Cells written for other programs: a format a file, behind one protocol (``base.Exporter``)."""
