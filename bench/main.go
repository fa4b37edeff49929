// Command bench measures Thaw next to what it stands beside or on: conversion next to
// containerd's pull, an lvol next to the raw file, file systems on presented disks
// next to the same ones on a plain file, starts next to containerd's overlayfs.
//
// What is compared is measured in turns, in one run on one machine, because a figure
// alone says little: see docs/benchmarks.md for what each row means. Everything runs
// in folders of its own, which are taken away at the end and on Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

func main() {
	// What measures I/O over connections runs itself as server and as client.
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "load") {
		run := serve
		if os.Args[1] == "load" {
			run = load
		}
		if err := run(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench "+os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	var o options
	var match string
	flag.StringVar(&match, "run", "", "measure only rows whose name matches this regular expression, and the floors they are compared with")
	flag.IntVar(&o.rounds, "n", 0, "runs of each row (default: each comparison's own number)")
	flag.StringVar(&o.json, "json", "out/bench.json", "file for the figures")
	flag.StringVar(&o.cache, "cache", "out/cache", "folder for built image layers")
	flag.StringVar(&o.profiles, "profile", "", "folder for CPU profiles of every server and client of ours in the io-* rows")
	flag.BoolVar(&o.list, "list", false, "print the names of the rows and exit")
	flag.Parse()
	var err error
	if o.match, err = regexp.Compile(match); err != nil || flag.NArg() > 0 || o.rounds < 0 {
		fmt.Fprintln(os.Stderr, "bench: usage: bench [-run REGEXP] [-n RUNS] [-json FILE] [-cache DIR] [-profile DIR] [-list]", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	match  *regexp.Regexp
	rounds int // 0: each comparison's own
	json   string
	cache  string
	list   bool

	profiles string // folder, "" for none
}

func run(ctx context.Context, o options) (err error) {
	b := &bench{o: o}
	var chosen []comparison
	for _, c := range b.comparisons() {
		if c = c.only(o.match); len(c.subjects) > 0 {
			chosen = append(chosen, c)
		}
	}
	if o.list {
		for _, c := range chosen {
			for _, name := range c.rowNames() {
				fmt.Println(name)
			}
		}
		return nil
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no row matches %q: see -list", o.match)
	}
	if b.lab, err = lab.New(); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, b.pool.value.close(), b.net.value.close(), b.controlEmbedded.value.close(), b.controlSPDK.value.close(), b.lab.Close())
	}()

	fmt.Println(machine())
	var rows []Row
	for _, c := range chosen {
		measured, failed := b.compare(ctx, c)
		// What was measured before a failure is worth keeping.
		rows = append(rows, measured...)
		if failed != nil {
			return errors.Join(fmt.Errorf("%s: %w", c.name, failed), writeRows(o.json, rows))
		}
		if strings.HasPrefix(c.name, "io-") {
			printWide(os.Stdout, c, measured)
		} else {
			printTable(os.Stdout, c, measured)
		}
	}
	printAims(os.Stdout, netAims(), rows)
	if err := writeRows(o.json, rows); err != nil {
		return err
	}
	progress("figures are in %s", o.json)
	return nil
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// machine describes what the figures were measured on.
func machine() string {
	release, model := "?", "?"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var memory unix.Sysinfo_t
	_ = unix.Sysinfo(&memory)
	return fmt.Sprintf("%s %s, %d CPUs (%s), %.0f GiB of memory, %s", runtime.GOOS, release, runtime.NumCPU(), model,
		float64(memory.Totalram)*float64(memory.Unit)/(1<<30), runtime.Version())
}

// bench is what the comparisons share. Its fixtures are made when the first
// comparison that needs them runs.
type bench struct {
	o   options
	lab *lab.Lab

	registry fixture[*lab.Registry]
	source   fixture[string]
	data     fixture[*dataImage]
	pool     fixture[*poolIO]
	net      fixture[*netIO]

	controlEmbedded, controlSPDK fixture[*controlStore]

	number int // of containers and folders made so far
}

// fixture is made once, by the first who asks. The zero value is ready.
type fixture[T any] struct {
	once  sync.Once
	value T
	err   error
}

func (f *fixture[T]) get(make func() (T, error)) (T, error) {
	f.once.Do(func() { f.value, f.err = make() })
	return f.value, f.err
}

// next returns a name that no other call returned.
func (b *bench) next(prefix string) string {
	b.number++
	return fmt.Sprintf("%s%d", prefix, b.number)
}

// localRegistry is a registry on the loopback, whose speed no link limits.
func (b *bench) localRegistry(ctx context.Context) (*lab.Registry, error) {
	return b.registry.get(func() (*lab.Registry, error) {
		return b.lab.StartRegistry(ctx, lab.RegistryOptions{})
	})
}

// image is the reference of the demonstration's image, built from Debian packages and
// pushed to the local registry.
func (b *bench) image(ctx context.Context) (string, error) {
	return b.source.get(func() (string, error) {
		registry, err := b.localRegistry(ctx)
		if err != nil {
			return "", err
		}
		builder := recipe.Builder{Cache: filepath.Join(b.o.cache, "images"), Log: os.Stderr}
		image, err := builder.Build(ctx, recipe.Web())
		if err != nil {
			return "", err
		}
		ref := registry.Ref("bench/app", "1")
		return ref, recipe.Push(ctx, image, ref)
	})
}

// variant is a combination of image mode and file system.
type variant struct{ mode, filesystem string }

func (v variant) String() string { return v.mode + "-" + v.filesystem }

var variants = []variant{{"overlayfs", "erofs"}, {"overlayfs", "ext4"}, {"overlaybd", "ext4"}, {"overlaybd", "erofs"}}

func (b *bench) comparisons() []comparison {
	all := []comparison{b.conversion()}
	all = append(all, b.networked()...)
	all = append(all, b.lvols()...)
	all = append(all, b.filesystems()...)
	return append(all, b.warmStart(), b.coldStart(), b.control())
}

// settle lets what earlier runs left to write reach the disk, so that the next does
// not pay for it.
func settle() error {
	err := lab.Sync()
	time.Sleep(50 * time.Millisecond)
	return err
}
