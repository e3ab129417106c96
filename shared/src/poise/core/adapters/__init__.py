"""Adapters on Linear, Conv2d and Hugging Face ``Conv1D`` layers: attach, train, merge, save; and low-rank layers."""
