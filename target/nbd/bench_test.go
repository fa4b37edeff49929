package nbd

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// BenchmarkServers measures this server next to nbdkit and qemu-nbd with fio's nbd engine over
// a Unix socket on one file on tmpfs, server and client on a CPU each. Every round runs
// all servers one after the other, so that what else the machine does hits all;
// medians over the rounds are reported:
//
//	go test ./target/nbd -run '^$' -bench Servers -benchtime 5x
//
// THAW_BENCH_CPUS lists the CPUs of the servers, "0" unless set; the client has CPU 1.
func BenchmarkServers(b *testing.B) {
	for _, name := range []string{"fio", "nbdkit", "qemu-nbd", "taskset"} {
		if _, err := exec.LookPath(name); err != nil {
			b.Skipf("%s is not installed: run make deps", name)
		}
	}
	dir, err := os.MkdirTemp("/dev/shm", "nbd")
	if err != nil {
		b.Skipf("no tmpfs: %v", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "file")
	f, err := os.Create(file)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.CopyN(f, rand.Reader, 256<<20); err != nil {
		b.Fatal(err)
	}
	f.Close()
	cpus := os.Getenv("THAW_BENCH_CPUS")
	if cpus == "" {
		cpus = "0"
	}
	servers := []struct {
		name string
		args []string
	}{
		{"thaw", []string{os.Args[0]}},
		{"nbdkit", []string{"nbdkit", "-f", "-U", "SOCKET", "file", file}},
		{"qemu-nbd", []string{"qemu-nbd", "-f", "raw", "-t", "-k", "SOCKET", file}},
	}
	for _, load := range []struct {
		name, rw, bs string
		depth        int
	}{
		{"read 4k qd1", "randread", "4k", 1},
		{"read 4k qd8", "randread", "4k", 8},
		{"read 4k qd32", "randread", "4k", 32},
		{"write 4k qd1", "randwrite", "4k", 1},
		{"write 4k qd32", "randwrite", "4k", 32},
		{"read 128k qd8", "read", "128k", 8},
	} {
		b.Run(load.name, func(b *testing.B) {
			iops, cpu, p50 := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
			for b.Loop() {
				for _, s := range servers {
					socket := filepath.Join(dir, "s")
					os.Remove(socket)
					args := []string{"-c", cpus}
					for _, a := range s.args {
						if a == "SOCKET" {
							a = socket
						}
						args = append(args, a)
					}
					c := exec.Command("taskset", args...)
					c.Env = append(os.Environ(), "THAW_TEST_NBD_SERVE="+socket, "THAW_TEST_NBD_FILE="+file)
					in, err := c.StdinPipe() // our server ends with it
					if err != nil {
						b.Fatal(err)
					}
					if err := c.Start(); err != nil {
						b.Fatal(err)
					}
					for range 200 {
						if k, err := net.Dial("unix", socket); err == nil {
							k.Close()
							break
						}
						time.Sleep(10 * time.Millisecond)
					}
					before := cpuSeconds(c.Process.Pid)
					out, err := exec.Command("taskset", "-c", "1", "fio", "--name=x", "--ioengine=nbd", "--uri="+uri(socket, ""),
						"--rw="+load.rw, "--bs="+load.bs, fmt.Sprintf("--iodepth=%d", load.depth), "--size=256M",
						"--time_based", "--runtime=1", "--thread=1", "--output-format=json").Output()
					after := cpuSeconds(c.Process.Pid)
					in.Close()
					c.Process.Kill()
					c.Wait()
					var r struct {
						Jobs []struct{ Read, Write result }
					}
					out = out[max(bytes.IndexByte(out, '{'), 0):] // the engine greets first
					if e := json.Unmarshal(out, &r); err != nil || e != nil || len(r.Jobs) != 1 {
						b.Fatalf("fio: %v, %v: %s", err, e, out)
					}
					v := r.Jobs[0].Read
					if strings.HasSuffix(load.rw, "write") {
						v = r.Jobs[0].Write
					}
					iops[s.name] = append(iops[s.name], v.IOPS)
					cpu[s.name] = append(cpu[s.name], (after-before)/v.Total*1e6)
					p50[s.name] = append(p50[s.name], v.Latency.Percentile["50.000000"]/1000)
				}
			}
			for _, s := range servers {
				b.ReportMetric(median(iops[s.name]), s.name+"-IOPS")
				b.ReportMetric(median(cpu[s.name]), s.name+"-CPUs/M")
				b.ReportMetric(median(p50[s.name]), s.name+"-p50-us")
			}
			b.ReportMetric(0, "ns/op") // says nothing here
		})
	}
}

type result struct {
	IOPS    float64
	Total   float64                                 `json:"total_ios"`
	Latency struct{ Percentile map[string]float64 } `json:"clat_ns"`
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// cpuSeconds is what a process used, in user and kernel.
func cpuSeconds(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks int
	for _, f := range fields[11:13] {
		n, _ := strconv.Atoi(f)
		ticks += n
	}
	return float64(ticks) / 100
}
