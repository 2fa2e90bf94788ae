@rem package.json says `exec node ...` so that no shell stands between npm and Node. Windows has no such word; this is it.
@%*
