"""Data: an index of the images, a plan of what each goes through, and image pipelines that turn plans into tensors."""
