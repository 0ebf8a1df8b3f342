"""Arrays and kernels of one device, behind the protocol of `base.Backend`; nothing here knows of other ranks."""
