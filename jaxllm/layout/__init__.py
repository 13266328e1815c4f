"""Layouts: the mesh, the table from logical to mesh axes, ZeRO. Knows no model."""
