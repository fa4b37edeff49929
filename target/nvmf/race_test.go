//go:build race

package nvmf_test

// raceDetector tells that resident memory is mostly the race detector's.
const raceDetector = true
