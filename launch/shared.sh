# What the launchers share; sourced, not run. Each of them prints with --dry-run what it would do, and nothing else.
# shellcheck shell=bash disable=SC2034

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "launch: this is bash $BASH_VERSION; install bash 4.4 or newer" >&2
    exit 2
fi
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$here") # of the code
dry_run=
folder=lmjax # where the code lies on other hosts, below the home folder

say() { echo "launch: $*" >&2; }

# A mistake of the user's: one line, and the exit code that lmjax has for them.
fail() {
    say "$*"
    exit 2
}

# The comment that a script opens with.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

# Words -> one line that a shell reads back as the same words.
quoted() {
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or prints it.
run() {
    if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# positive NAME VALUE
positive() {
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=$2: give a whole number, 1 or more"
}

# plain WHAT VALUE: a name that can stand in any command
plain() {
    [[ $2 =~ ^[A-Za-z0-9][A-Za-z0-9._@-]*$ ]] || fail "$1 '$2': give letters, digits, dots and dashes"
}

# What is left of the arguments of a training: a config, which need not exist here for hosts with files of their own.
config() {
    [[ ${1:-} == *.py ]] ||
        fail "'${1:-}' where a config belongs: give a file such as configs/quickstart.py, then --key=value …"
}

# ---- Texts for the shells of other hosts (tpu.sh, gpu.sh) ------------------------------------------------------------

# Unpacks what lies in code.tgz, and installs it with an extra. TPU VMs come with a Python that is too old.
install_there() {
    cat <<END
mkdir -p $folder && cd $folder && tar xzf ../code.tgz && rm ../code.tgz || exit
if [ ! -x .venv/bin/pip ]; then
    python=\$(command -v python3.13 || command -v python3.12 || command -v python3.11)
    if [ "\$python" ]; then "\$python" -m venv .venv
    else python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --seed --python 3.12 .venv; fi || exit
fi
.venv/bin/pip install -q -e '.[$1]'
END
}

# train_there NAME=VALUE … CONFIG --key=value …: starts the restart loop, which outlives the connection.
train_there() {
    cat <<END
cd $folder || exit
if [ -s train.pid ] && kill -0 "\$(cat train.pid)" 2> /dev/null; then
    echo 'launch: lmjax is training here already; stop it first' >&2
    exit 4
fi
PATH="\$PWD/.venv/bin:\$PATH" setsid nohup env $(quoted "$@") >> train.log 2>&1 < /dev/null &
echo \$! > train.pid
END
}

# The loop of one host of several: 8 is also what the others are told when one of them dies, so it is tried again.
loop=(launch/restart.sh "--few=1,8,139" lmjax train)

stop_there() {
    echo "kill -TERM \"\$(cat $folder/train.pid)\""
}

follow_there() {
    echo "tail -n 100 -F $folder/train.log"
}

# The code as it lies here, without what runs and tools leave behind, and without a file of secrets.
code=$root/build/code.tgz
pack() {
    local path leave=()
    for path in .git '.env*' .venv .pytest_cache .ruff_cache build runs data; do leave+=("--exclude=./$path"); done
    leave+=("--exclude=__pycache__" "--exclude=*.egg-info")
    run mkdir -p "$root/build" && run tar czf "$code" -C "$root" "${leave[@]}" .
}
