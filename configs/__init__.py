"""Shipped configurations: `<method>/<experiment>.yaml`, `hardware/`, and the layer under all of them, `base.yaml`."""
