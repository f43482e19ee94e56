package contextstore

import (
	"encoding/binary"
	"errors"
	"math"
)

// What an event in a Valkey's stream reports.
const (
	eventPut    = 1
	eventCool   = 2
	eventForget = 3
)

const (
	eventVersion = 1
	// maxEventLinks is how many links of one chain other proxies are told: half a megabyte of text.
	maxEventLinks = 2048
	// maxEventName is the longest name of a server.
	maxEventName = 255

	// eventHead is how many bytes precede the name of the server: the version, the kind, the proxy,
	// the model and the name's length. eventSight is how many come after it in a put: lane, time and
	// tokens.
	eventHead  = 1 + 1 + 8 + 8 + 1
	eventSight = 2 + 8 + 4
)

var errEvent = errors.New("this is no event of a store of prefixes")

// event is one call of a store, as other proxies read it. It has no text but the name of the server.
type event struct {
	kind     byte
	proxy    uint64   // random, chosen at its start
	model    uint64   // a hash of the model's key; 0 for all models
	upstream string   // the name of the server; "" in a forget
	lane     uint16   // this and what follows only in a put
	at       int64    // Unix time in nanoseconds; 0: the zero time.Time
	tokens   uint32   // of the whole chain; 0: not known
	links    []uint64 // hashes
}

// encode returns the bytes of an event.
func (e event) encode() []byte {
	b := make([]byte, 0, eventHead+len(e.upstream)+eventSight+8*len(e.links))
	b = append(b, eventVersion, e.kind)
	b = binary.LittleEndian.AppendUint64(b, e.proxy)
	b = binary.LittleEndian.AppendUint64(b, e.model)
	b = append(b, byte(len(e.upstream)))
	b = append(b, e.upstream...)
	if e.kind != eventPut {
		return b
	}
	b = binary.LittleEndian.AppendUint16(b, e.lane)
	b = binary.LittleEndian.AppendUint64(b, uint64(e.at))
	b = binary.LittleEndian.AppendUint32(b, e.tokens)
	for _, hash := range e.links {
		b = binary.LittleEndian.AppendUint64(b, hash)
	}
	return b
}

// decodeEvent returns the event of these bytes. Anybody who may write to the server can have written
// them.
func decodeEvent(b []byte) (event, error) {
	if len(b) < eventHead || b[0] != eventVersion {
		return event{}, errEvent
	}
	e := event{
		kind:  b[1],
		proxy: binary.LittleEndian.Uint64(b[2:]),
		model: binary.LittleEndian.Uint64(b[10:]),
	}
	length := int(b[18])
	if b = b[eventHead:]; len(b) < length {
		return event{}, errEvent
	}
	e.upstream, b = string(b[:length]), b[length:]
	switch e.kind {
	case eventPut:
		return e.decodeSight(b)
	case eventCool:
		if len(b) == 0 && e.upstream != "" {
			return e, nil
		}
	case eventForget:
		if len(b) == 0 && e.upstream == "" {
			return e, nil
		}
	}
	return event{}, errEvent
}

// decodeSight reads what only a put has.
func (e event) decodeSight(b []byte) (event, error) {
	if e.upstream == "" || e.model == 0 || len(b) <= eventSight || (len(b)-eventSight)%8 != 0 ||
		len(b) > eventSight+8*maxEventLinks {
		return event{}, errEvent
	}
	e.lane = binary.LittleEndian.Uint16(b)
	e.at = int64(binary.LittleEndian.Uint64(b[2:]))
	e.tokens = binary.LittleEndian.Uint32(b[10:])
	if e.tokens > math.MaxInt32 {
		return event{}, errEvent
	}
	for b = b[eventSight:]; len(b) > 0; b = b[8:] {
		hash := binary.LittleEndian.Uint64(b)
		if hash == 0 {
			return event{}, errEvent // prefix makes none
		}
		e.links = append(e.links, hash)
	}
	return e, nil
}
