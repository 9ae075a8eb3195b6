"""Classifying sets of images and writing what comes out."""
