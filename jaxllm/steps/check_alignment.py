def check_options(name, group):
    pass
