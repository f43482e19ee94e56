# fish completion for ollama-cacheproxy
function __ollama_cacheproxy_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in (ollama-cacheproxy completion words -- $words[2..-1] 2>/dev/null)
        if test "$line" = :files
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c ollama-cacheproxy -f -a '(__ollama_cacheproxy_complete)'
