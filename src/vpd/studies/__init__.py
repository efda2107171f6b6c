"""Studies run several settings by several seeds (:mod:`.study`) and set them side by side (:mod:`.comparison`)."""
