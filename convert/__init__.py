"""Models: find sites, swap, measure fidelity, save and load. Modules are imported where they are used."""
