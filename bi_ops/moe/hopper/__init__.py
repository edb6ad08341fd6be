"""Warp-specialised kernels of mixture-of-experts layers, in Gluon, with their launches."""
