"""Traffic while workers are killed, stopped and cut off: nobody may notice but by the time that it takes."""
