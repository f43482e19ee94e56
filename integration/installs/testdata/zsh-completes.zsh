# Types into a new zsh, with a tab at the end, and prints the resulting line.
zmodload zsh/zpty
export TERM=dumb
zpty -b shell zsh -f -i
# The typed text is echoed, too; it must not look like the prompt.
zpty -w shell "autoload -U compinit; compinit -u; PROMPT='re''ady:'"
zpty -r shell seen '*ready:*'
zpty -w -n shell $'ollama-cacheproxy --check --log-format=j\t'
zpty -r shell seen '*json*'
print -r -- $seen
zpty -d shell
