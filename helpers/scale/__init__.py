"""Many trainings (`search`), or more images than one machine holds (`bulk`): needs requirements-scale.txt."""
