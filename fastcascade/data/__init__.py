"""Images and labels: every accepted form as batches, the file formats, image folders, downloads."""
