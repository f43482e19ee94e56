// Answerstores measures embedded databases under the load of a store of answers: vectors written 64
// at a time and read 1,000 keys at once, and answers of 1 to 50 KB. It is a module of its own, so
// that the proxy depends only on the database that it uses. docs/answer-stores.md has the figures.
//
//	cd bench/answerstores && go run .
//
// Each database runs in a process of its own. With -full DIR, DIR is a small file system (as of mount
// -t tmpfs -o size=64m) that is filled up.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// database is one embedded database.
type database interface {
	put(keys [][]byte, values [][]byte) error // one transaction
	get(keys [][]byte) (found [][]byte, err error)
	remove(keys [][]byte) error
	shrink() error // gives the room of removed values back to the file system
	close() error
}

var databases = map[string]func(dir string) (database, error){}

var (
	which   = flag.String("db", "", "only this database, in this process")
	mode    = flag.String("mode", "load", "load, write (until killed), full")
	dir     = flag.String("dir", "", "folder of the database")
	full    = flag.String("full", "", "a small file system to fill up")
	limit   = flag.Duration("limit", 2*time.Minute, "how long a process may take")
	vectors = flag.Int("vectors", 200_000, "how many vectors of 384 float32 are written")
	answers = flag.Int("answers", 10_000, "how many answers of 1 to 50 KB are written")
)

func main() {
	flag.Parse()
	if *which != "" {
		if err := one(*which); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	names := []string{}
	for name := range databases {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		temp, err := os.MkdirTemp("", "answerstores")
		if err != nil {
			panic(err)
		}
		fmt.Printf("## %s\n", name)
		self("-db", name, "-dir", filepath.Join(temp, "load"),
			"-vectors", fmt.Sprint(*vectors), "-answers", fmt.Sprint(*answers))
		killed(name, filepath.Join(temp, "kill"))
		os.RemoveAll(temp)
		if *full != "" {
			self("-db", name, "-dir", filepath.Join(*full, name), "-mode", "full")
			os.RemoveAll(filepath.Join(*full, name))
		}
	}
}

func self(args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), *limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		fmt.Println("still not done after", *limit)
	}
	if len(out) > 1500 {
		out = append(out[:1500], " …\n"...)
	}
	fmt.Print(string(out))
	if err != nil {
		fmt.Println("the process ended:", err)
	}
}

// value returns a value for a key: as random as a vector's bits, and with a checksum.
func value(key []byte, length int) []byte {
	v := make([]byte, length)
	random := rand.New(rand.NewPCG(binary.LittleEndian.Uint64(key), 1))
	for i := 4; i+8 <= length; i += 8 {
		binary.LittleEndian.PutUint64(v[i:], random.Uint64())
	}
	binary.LittleEndian.PutUint32(v, crc32.ChecksumIEEE(v[4:]))
	return v
}

func whole(v []byte) bool {
	return len(v) > 4 && binary.LittleEndian.Uint32(v) == crc32.ChecksumIEEE(v[4:])
}

func keyOf(n int) []byte {
	random := rand.New(rand.NewPCG(uint64(n), 7))
	key := make([]byte, 32)
	for i := range 4 {
		binary.LittleEndian.PutUint64(key[8*i:], random.Uint64())
	}
	return key
}

func batch(from, n int, length func(int) int) (keys, values [][]byte) {
	for i := from; i < from+n; i++ {
		key := keyOf(i)
		keys, values = append(keys, key), append(values, value(key, length(i)))
	}
	return keys, values
}

func one(name string) error {
	db, err := databases[name](*dir)
	if err != nil {
		return err
	}
	switch *mode {
	case "write":
		for n := 0; ; n += 64 {
			if err := db.put(batch(n, 64, func(int) int { return 1536 })); err != nil {
				return err
			}
			fmt.Println(n + 64)
		}
	case "full":
		return fill(db)
	}
	if err := load(db, "vectors", 0, *vectors, 64, func(int) int { return 1536 }); err != nil {
		return err
	}
	if err := load(db, "answers", 1<<30, *answers, 4, func(n int) int { return 1000 + n%49_000 }); err != nil {
		return err
	}
	fmt.Printf("goroutines %d, most memory resident %s\n", runtime.NumGoroutine(), peak())
	start := time.Now()
	for n := 0; n < *vectors/2; n += 1000 {
		keys, _ := batch(n, 1000, func(int) int { return 8 })
		if err := db.remove(keys); err != nil {
			return err
		}
	}
	fmt.Printf("half of the vectors removed in %.1f s: %d MB on disk", time.Since(start).Seconds(), size()>>20)
	start = time.Now()
	if err := db.shrink(); err != nil {
		return err
	}
	fmt.Printf("; shrunk in %.1f s: %d MB\n", time.Since(start).Seconds(), size()>>20)
	return db.close()
}

func load(db database, what string, from, n, each int, length func(int) int) error {
	before, total := size(), int64(0)
	var slowest, spent time.Duration
	for i := 0; i < n; i += each {
		keys, values := batch(from+i, min(each, n-i), length)
		for _, v := range values {
			total += int64(len(v))
		}
		start := time.Now()
		if err := db.put(keys, values); err != nil {
			return err
		}
		took := time.Since(start)
		spent += took
		slowest = max(slowest, took)
	}
	fmt.Printf("%s: %d written in %.1f s (%.0f µs each, slowest batch %.0f ms); %d MB are %d MB on disk\n",
		what, n, spent.Seconds(), float64(spent.Microseconds())/float64(n), slowest.Seconds()*1000,
		total>>20, (size()-before)>>20)
	var times []time.Duration
	for range 100 {
		var keys [][]byte
		for range min(1000, n/10) {
			keys = append(keys, keyOf(from+rand.IntN(n)))
		}
		start := time.Now()
		found, err := db.get(keys)
		times = append(times, time.Since(start))
		if err != nil {
			return err
		}
		for _, v := range found {
			if !whole(v) {
				return fmt.Errorf("a value of %d bytes is not as it was written", len(v))
			}
		}
	}
	slices.Sort(times)
	fmt.Printf("%s: %d keys read in %.2f ms (median; slowest %.1f ms)\n", what, min(1000, n/10),
		times[50].Seconds()*1000, times[99].Seconds()*1000)
	return nil
}

func size() (sum int64) {
	filepath.WalkDir(*dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if info, err := d.Info(); err == nil {
				sum += blocks(info)
			}
		}
		return nil
	})
	return sum
}

func peak() string {
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmHWM") {
			return strings.Join(strings.Fields(line)[1:], " ")
		}
	}
	return "unknown"
}

// killed kills a writer many times, and looks for what it had acknowledged.
func killed(name, path string) {
	kills, lost, torn := 10, 0, 0
	for i := range kills {
		cmd := exec.Command(os.Args[0], "-db", name, "-dir", path, "-mode", "write")
		out, err := cmd.StdoutPipe()
		if err != nil {
			panic(err)
		}
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		acknowledged := 0
		lines := bufio.NewScanner(out)
		for n := 0; n < 20+7*i && lines.Scan(); n++ {
			fmt.Sscan(lines.Text(), &acknowledged)
		}
		cmd.Process.Kill()
		cmd.Wait()
		db, err := databases[name](path)
		if err != nil {
			fmt.Println("after kill -9 it does not open:", err)
			return
		}
		keys, _ := batch(0, acknowledged, func(int) int { return 8 })
		found, err := db.get(keys)
		if err != nil {
			fmt.Println("after kill -9:", err)
		}
		for _, v := range found {
			if v == nil {
				lost++
			} else if !whole(v) {
				torn++
			}
		}
		db.close()
	}
	fmt.Printf("killed %d times: %d acknowledged values lost, %d torn\n", kills, lost, torn)
}

// fill writes until the disk is full, goes on for a while, makes room, and tries again.
func fill(db database) error {
	ballast := filepath.Join(filepath.Dir(*dir), "ballast")
	if err := os.WriteFile(ballast, make([]byte, 16<<20), 0o600); err != nil {
		return err
	}
	n, failures := 0, 0
	var last error
	for ; failures < 20; n += 64 {
		if err := db.put(batch(n, 64, func(int) int { return 1536 })); err != nil {
			failures, last = failures+1, err
		}
	}
	fmt.Printf("full after %d MB: %v\n", n*1536>>20, last)
	first, _ := batch(0, 64, func(int) int { return 8 })
	found, err := db.get(first)
	fmt.Printf("reads then: %v, %v; ", err, err == nil && whole(found[0]))
	os.Remove(ballast)
	err = db.put(batch(n, 64, func(int) int { return 1536 }))
	fmt.Printf("with room again: %v\n", err)
	return db.close()
}
