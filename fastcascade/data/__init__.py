"""Images and labels: batches of every accepted form, file formats, image folders, downloads."""
