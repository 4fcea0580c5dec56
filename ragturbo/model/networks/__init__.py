"""The networks of Stable Diffusion 1 and 2 in torch alone, without importing diffusers and transformers.

The import of those two takes longer than everything else between a fresh process and its first image. The classes here
have their names, attributes, parameter names and call signatures, and compute the same bits. `load.py` makes one of a
folder whose configuration has no option that is not implemented here; any other folder is loaded by the libraries.
`library_class.py` turns a network into the library's own class where its other methods are needed.
"""
