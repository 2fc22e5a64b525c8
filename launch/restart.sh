#!/usr/bin/env bash
# Gives a command again until it is done, or until nobody but you can mend what is wrong.
#
#     launch/restart.sh [--dry-run] [--limit=20] [--pause=5] [--few=1,139] [--stop=CODES] [--lasting=600] COMMAND …
#
# The exit codes are those of docs/reliability.md:
#     6, 9, 134, 137, 143 stuck, a peer died, killed, told to stop by others than you: again
#     --few               by default a bug, with or without a traceback: again, three times in a row at most
#     all others          done, or a mistake in config, data, run folder or devices: the loop ends with the same code
# --stop takes codes out of the first two lines. The pause between two attempts starts with --pause seconds and doubles,
# up to five minutes. After --limit restarts in a row the loop gives up; an attempt of --lasting seconds starts the
# count, and the pause, anew. SIGTERM and Ctrl-C reach the command once, and end the loop with it.

set -um # with job control, so that a Ctrl-C at the terminal is not sent to the command a second time
source "$(dirname -- "${BASH_SOURCE[0]}")/shared.sh"

again=' 6 9 134 137 143 ' few=' 1 139 ' stop='' limit=20 pause=5 lasting=600
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --limit=*) limit=${1#*=} && positive --limit "$limit" ;;
        --pause=*) pause=${1#*=} ;;
        --lasting=*) lasting=${1#*=} ;;
        --few=* | --stop=*)
            codes=${1#*=}
            [[ $codes =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "$1: give exit codes, such as 1,8"
            if [[ $1 == --few=* ]]; then few=" ${codes//,/ } "; else stop=${codes//,/ }; fi
            ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; options stand before the command" ;;
        *) break ;;
    esac
    shift
done
for code in $stop; do again=${again/" $code "/ } few=${few/" $code "/ }; done
(($#)) || fail "no command: give one, such as launch/restart.sh lmjax train configs/quickstart.py"
[[ $pause =~ ^[0-9]{1,4}$ ]] || fail "--pause=$pause: give seconds"
[[ $lasting =~ ^[0-9]{1,6}$ ]] || fail "--lasting=$lasting: give seconds"
if [[ $dry_run ]]; then
    quoted "$@"
    say "would give that again after $pause s and more, $limit times in a row at most:"
    say "always after$again, three times in a row after$few"
    exit 0
fi

child='' signal='' passed_on=''
# shellcheck disable=SC2329  # the traps call it
pass_on() {
    signal=$1
    [[ $child ]] || return
    passed_on=1
    kill -s "$1" "$child" 2> /dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

restarts=0 in_row=0 wait=$pause
while :; do
    began=$SECONDS
    "$@" < /dev/null &
    child=$!
    [[ ! $signal || $passed_on ]] || pass_on "$signal" # it came just before
    {
        while kill -0 "$child"; do
            sleep 0.2 &
            wait $!
        done
        wait "$child"
        code=$?
    } 2> /dev/null
    child=''
    ((code)) || exit 0
    [[ ! $signal ]] || exit "$code"
    if ((SECONDS - began >= lasting)); then restarts=0 in_row=0 wait=$pause; fi
    if [[ $few == *" $code "* ]]; then
        ((++in_row <= 3)) || { say "$1 ended with $code four times in a row; giving up" && exit "$code"; }
    elif [[ $again == *" $code "* ]]; then
        in_row=0
    else
        say "$1 ended with $code, which will not mend itself (docs/reliability.md)"
        exit "$code"
    fi
    ((++restarts <= limit)) || { say "$1 ended with $code after $limit restarts; giving up" && exit "$code"; }
    say "$1 ended with $code; again in $wait s (restart $restarts of $limit)"
    sleep "$wait" &
    wait $! || exit "$code" # a signal
    wait=$((wait * 2 > 300 ? 300 : wait * 2))
done
