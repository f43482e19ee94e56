package proxy

import (
	"net/http"
	"strconv"
)

// timing reports to the client how long its request waited in the proxy. The model's time is known
// only at the end of an answer, long after the header was sent. Holding back the header until a
// short answer is complete would also hold back the beginning of a slow one. Few clients read
// trailers, and proxies on the way drop them.
func (ex *exchange) timing(header http.Header) {
	waited := ex.Waited + ex.paused
	header.Set(headerWaited, strconv.FormatFloat(waited.Seconds(), 'f', 3, 64))
	header.Add("Server-Timing", "queue;dur="+strconv.FormatFloat(ms(waited), 'f', 1, 64))
}
