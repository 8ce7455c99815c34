"""The completion of `ldrld-jax` in a shell: commands, their flags, and config keys after `--config.`."""

from collections.abc import Mapping, Sequence

_BASH = """\
# Completes ldrld-jax in bash: source <(ldrld-jax completion bash)
_ldrld_jax() {
    local word=${COMP_WORDS[COMP_CWORD]} words=''
    case $COMP_CWORD,${COMP_WORDS[1]} in
    1,*) words='@commands' ;;
@cases
    esac
    if [[ $word == --config.* && $words == *--config.* ]]; then
        words='@keys'
    elif [[ $words == -* && $word != -* ]]; then
        words=''  # a file, by -o default
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ $word == --config* ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _ldrld_jax ldrld-jax
"""

_ZSH = """\
# Completes ldrld-jax in zsh: source <(ldrld-jax completion zsh)
_ldrld_jax() {
    local known=''
    case $CURRENT,${words[2]} in
    2,*) local -a commands=(@described); _describe command commands; return ;;
@cases
    esac
    if [[ $PREFIX == --config.* && $known == *--config.* ]]; then
        known='@keys'
        compadd -S '' -- ${=known}
    elif [[ $known == -* && $PREFIX != -* ]]; then
        _files
    else
        compadd -- ${=known}
    fi
}
compdef _ldrld_jax ldrld-jax
"""

SHELLS = {"bash": (_BASH, "words"), "zsh": (_ZSH, "known")}


def script(shell: str, commands: Mapping[str, str], words: Mapping[str, Sequence[str]], keys: Sequence[str]) -> str:
    """Returns the script that a shell sources.

    Args:
      shell: a key of `SHELLS`.
      commands: what each command does.
      words: what may follow a command: its flags, "--config." among them if it takes config keys; or other words.
      keys: all config keys.

    Example:
      >>> print(script("bash", {"train": "Trains"}, {"train": ["--workdir", "--config."]}, ["seed"]).splitlines()[0])
      # Completes ldrld-jax in bash: source <(ldrld-jax completion bash)
    """
    template, variable = SHELLS[shell]
    parts = {
        "commands": " ".join(commands),
        "described": " ".join(f"'{name}:{does}'" for name, does in commands.items()),
        "cases": "\n".join(f"    *,{name}) {variable}='{' '.join(after)}' ;;" for name, after in words.items()),
        "keys": " ".join(f"--config.{key}=" for key in keys),
    }
    for name, text in parts.items():
        template = template.replace(f"@{name}", text)
    return template
