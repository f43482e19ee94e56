//go:build unix

package valkeyserver

import (
	"bufio"
	"fmt"
	"net"
	"testing"
)

func TestStart(t *testing.T) {
	s := Start(t)
	for range 2 {
		conn, err := net.Dial("tcp", s.Addr())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "PING\r\n")
		if line, err := bufio.NewReader(conn).ReadString('\n'); line != "+PONG\r\n" {
			t.Errorf("PING: %q, %v", line, err)
		}
		conn.Close()
		s.Kill()
		s.Restart()
	}
}
