package ollamasim

import (
	"errors"
	"fmt"
	"math"
	"net/http"

	"github.com/ollama/ollama/api"
)

const dimensions = 64 // of embeddings

func (s *Server) embed(w http.ResponseWriter, r *http.Request) {
	var req api.EmbedRequest
	if err := read(r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	answer, status, err := s.embedding(r, &req)
	if err != nil {
		writeError(w, status, err.Error())
		return
	}
	writeBody(w, http.StatusOK, answer)
}

// embedding computes embeddings. The texts of a request are evaluated one after the other, and
// nothing of them is reused.
func (s *Server) embedding(r *http.Request, in *api.EmbedRequest) (*api.EmbedResponse, int, error) {
	texts, err := inputs(in.Input)
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	m := s.model(in.Model)
	if m == nil {
		return nil, http.StatusNotFound, fmt.Errorf("model '%s' not found", in.Model)
	}
	req, _, err := s.request(m, in.Options, in.KeepAlive, nil, in.Truncate)
	if err != nil {
		return nil, http.StatusInternalServerError, err
	}
	out := &api.EmbedResponse{Model: in.Model, Embeddings: [][]float32{}}
	for _, text := range texts {
		tokens := tokenize(nil, text)
		if limit := req.options.numCtx; len(tokens) > limit {
			if !req.truncate {
				return nil, http.StatusBadRequest, errors.New("the input length exceeds the context length")
			}
			tokens = tokens[:limit]
		}
		req.prompt = append(req.prompt, tokens...)
		out.Embeddings = append(out.Embeddings, vector(seed(m.Name, tokens), in.Dimensions))
	}
	if req.embed, req.loadOnly = true, len(req.prompt) == 0; !m.Embedding && !req.loadOnly && s.era != eraA {
		return nil, http.StatusNotImplemented, api.StatusError{ErrorMessage: "This server does not support embeddings. Start it with `--embeddings`"}
	}
	s.arrive(req)
	if _, err := s.write(r, req, nil); err != nil {
		if errors.Is(err, errMaxQueue) {
			return nil, http.StatusServiceUnavailable, err
		}
		panic(http.ErrAbortHandler)
	}
	end := s.outcome(req)
	out.TotalDuration, out.LoadDuration, out.PromptEvalCount = end.TotalDuration, end.LoadDuration, end.PromptEvalCount
	return out, http.StatusOK, nil
}

// inputs returns the texts of a request: one, or a list.
func inputs(in any) (texts []string, err error) {
	list, ok := in.([]any)
	if !ok && in != nil && in != "" {
		list = []any{in}
	}
	for _, x := range list {
		text, ok := x.(string)
		if !ok {
			return nil, errors.New("invalid input type")
		}
		texts = append(texts, text)
	}
	return texts, nil
}

// vector is a text's embedding, of length 1.
func vector(seed uint64, n int) []float32 {
	if n <= 0 || n > dimensions {
		n = dimensions
	}
	v, sum := make([]float32, n), 0.0
	for i := range v {
		v[i] = float32(mix(seed, uint64(i)+1)>>40)/(1<<24) - 0.5
		sum += float64(v[i]) * float64(v[i])
	}
	for i := range v {
		v[i] /= float32(math.Sqrt(sum))
	}
	return v
}
