"""The whole MoE layer: experts applied to what the routing sorted."""
