# Types into a zsh of its own, with a tab at the end, and prints what is there then.
zmodload zsh/zpty
export TERM=dumb
zpty -b shell zsh -f -i
# What is typed is seen, too; it is not to look like the prompt.
zpty -w shell "autoload -U compinit; compinit -u; PROMPT='re''ady:'"
zpty -r shell seen '*ready:*'
zpty -w -n shell $'ollama-cacheproxy --check --log-format=j\t'
zpty -r shell seen '*json*'
print -r -- $seen
zpty -d shell
