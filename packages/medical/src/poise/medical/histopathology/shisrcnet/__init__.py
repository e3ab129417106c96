"""SHISRCNet: super-resolution and classification of low-resolution histology, trained together."""
