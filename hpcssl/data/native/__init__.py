"""An optional decoder in C: decodes the part of a JPEG that its views show, and resizes it as the rows arrive.

It gives the same bits as ``hpcssl.data.decode`` followed by ``hpcssl.data.crop``, in less time, and holds no lock of
Python meanwhile. It is built at installation where a C compiler and the headers of libjpeg-turbo are found. Everything
works without it.
"""
