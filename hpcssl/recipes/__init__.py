"""The packaged recipes, one YAML file each: ``hpcssl recipes`` lists them, ``hpcssl show NAME`` prints one."""
