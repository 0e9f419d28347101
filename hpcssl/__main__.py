from hpcssl.cli import main

main()
