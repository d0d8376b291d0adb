"""How devices find each other: mDNS, addresses that were told, last-known ones. Hints, never an
authority: what a sighting says is true only when the device at one of its addresses has greeted.
"""
