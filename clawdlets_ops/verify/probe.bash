# Looks at TCP ports from where it runs, with nothing but bash and coreutils: for a vantage that has no Python, as a NixOS
# host has none. Handed to "bash -s" on its standard input; arguments, outcomes and answer are those of probe.py.
#
#   bash -s -- FAMILY ADDRESS PORT [FAMILY ADDRESS PORT ...]
set -u
LC_ALL=C
export LC_ALL

# connect FILE ADDRESS PORT: one fresh connect; an open port may say its first 60 bytes within a second, two in all.
connect() {
  timeout 2 bash -c '
    exec 3<>"/dev/tcp/$0/$1" || exit 1
    IFS= read -r -t 1 -n 60 line <&3
    printf "%s" "$line"' "$2" "$3" >"$1.said" 2>"$1.error"
  echo $? >"$1.status"
}

# look NUMBER FAMILY ADDRESS PORT: three connects, a little apart; the most telling outcome counts.
look() {
  for number in 1 2 3; do
    (sleep "0.$((number * 25 - 25))"; connect "$answers/$1-$number" "$3" "$4") &
  done
  wait
  best=9 outcome=error banner= detail=
  for number in 1 2 3; do
    file=$answers/$1-$number
    error=$(tr -cd ' !#-[]-~' <"$file.error" | tail -c 120)
    case "$(cat "$file.status") $error" in
      "0 "*) rank=0 now=open ;;
      *refused*) rank=1 now=refused ;;
      124*) rank=2 now=filtered ;;
      *unreachable* | *"No route"* | *"Cannot assign"* | *"not supported"*) rank=3 now=unreachable ;;
      *) rank=4 now=error ;;
    esac
    [ "$rank" -lt "$best" ] || continue
    best=$rank outcome=$now banner=$(tr -cd ' !#-[]-~' <"$file.said") detail=$error
  done
  if [ "$outcome" = open ]; then detail=; else banner=; fi
  printf '{"family": %s, "address": "%s", "port": %s, "outcome": "%s", "banner": "%s", "detail": "%s"}' \
    "$2" "$3" "$4" "$outcome" "$banner" "$detail"
}

answers=$(mktemp -d) && trap 'rm -rf "$answers"' EXIT
count=0
while [ $# -ge 3 ]; do
  look "$count" "$1" "$2" "$3" >"$answers/result-$count" &
  count=$((count + 1))
  shift 3
done
wait
printf '{"results": ['
for ((at = 0; at < count; at++)); do
  [ "$at" = 0 ] || printf ', '
  cat "$answers/result-$at"
done
printf ']}\n'
