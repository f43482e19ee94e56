package proxy

import (
	"net/http"
	"strconv"
)

// timing tells a client how long its request waited in the proxy. What the model then took is known
// at the end of an answer only, when the header has long been sent: to keep that back until a short
// answer has come whole would keep back the beginning of one that comes slowly, and few clients read
// trailers, which proxies on the way drop.
func (ex *exchange) timing(header http.Header) {
	waited := ex.Waited + ex.paused
	header.Set(headerWaited, strconv.FormatFloat(waited.Seconds(), 'f', 3, 64))
	header.Add("Server-Timing", "queue;dur="+strconv.FormatFloat(ms(waited), 'f', 1, 64))
}
