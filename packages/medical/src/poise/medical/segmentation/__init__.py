"""Segmentation: learning from masks that are not drawn well."""
